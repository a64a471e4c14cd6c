"""How often is the answer right, and does it come from the picture?"""
