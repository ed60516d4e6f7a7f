"""Tables of what methods certify on the same images: their rows, and how people read them."""
