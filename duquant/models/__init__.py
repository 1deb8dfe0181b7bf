"""What a decoder-only transformer looks like to us, and where its tensors come from."""
