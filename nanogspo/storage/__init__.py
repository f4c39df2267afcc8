"""What is read from disk or the hub, and what is written: files, formats, and the names tensors have in them."""
