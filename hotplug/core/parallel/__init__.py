"""Several ranks that run one model together: what they are told, over what, and the processes that they are."""
