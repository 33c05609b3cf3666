"""The embedded engine: any causal LM of `transformers`, in this process, on the CPU or one GPU."""
