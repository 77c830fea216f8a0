"""Fused ops: one public function each, over one torch.library op. Importing this module registers them.

Every entry checks its arguments, torch.ops.fastedit included, and raises ValueError before any work. A GPU is not asked
for offsets, segments and labels, that would wait for it: its kernels stay within the tensors whatever these say.

Under torch.autocast ``low_rank`` and ``key_value``, which multiply matrices, cast all features and
parameters but float64 to autocast's dtype, as torch's own products do. ``risk``, ``mmd2``, ``nearest_keys`` and
``topk_agreement``, whose results are float32 in any case, take their two features to the wider dtype of them where they
disagree. ``adam_step_``, ``adam_step_outer_`` and ``workspace`` are as without. Gradients come in the dtypes of what
was given.

torch.func differentiates through the public functions, once.
"""

from fastedit import _native as _native  # registers the compiled kernels
from fastedit.ops._library import implementations
from fastedit.ops.adam_step import adam_step_
from fastedit.ops.adam_step_outer import adam_step_outer_
from fastedit.ops.key_value import Activation, key_value
from fastedit.ops.low_rank import low_rank
from fastedit.ops.mmd2 import mmd2
from fastedit.ops.nearest_keys import nearest_keys
from fastedit.ops.risk import Kind, risk
from fastedit.ops.topk_agreement import topk_agreement
from fastedit.ops.workspace import keep_freed_memory, release_workspaces, workspace

__all__ = [
    "Activation",
    "Kind",
    "adam_step_",
    "adam_step_outer_",
    "implementations",
    "keep_freed_memory",
    "key_value",
    "low_rank",
    "mmd2",
    "nearest_keys",
    "release_workspaces",
    "risk",
    "topk_agreement",
    "workspace",
]
