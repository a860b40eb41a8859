"""Online: which samples make which step, read and packed into batches."""
