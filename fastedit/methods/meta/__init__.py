"""What MEND and KE share: hypernetworks, their training task and its views."""
