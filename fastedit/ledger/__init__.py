"""The ledger: edits that outlive the process. An SQLite database for the record, safetensors for the tensors."""

from fastedit.ledger.database import DamagedLedger, LedgerError
from fastedit.ledger.ledger import Ledger
from fastedit.ledger.opening import check_folder, open_ledger

__all__ = ["DamagedLedger", "Ledger", "LedgerError", "check_folder", "open_ledger"]
