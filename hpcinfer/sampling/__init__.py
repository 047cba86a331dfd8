"""From logits to tokens, by draws that depend on the row and not on the batch."""
