"""Tables of what a cascade of bounds and attacks makes of many images: their rows, and how people read them."""
