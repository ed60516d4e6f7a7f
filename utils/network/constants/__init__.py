"""What a forward computes with that is not perturbed: further arguments, and masks and lengths made of word numbers."""
