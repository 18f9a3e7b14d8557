"""Pictures that the program draws itself and knows everything about, and the target that learns to see on them."""
