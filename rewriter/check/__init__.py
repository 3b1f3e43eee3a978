"""Check: is the rewritten program as right as the user's own, and does it compile for each GPU?"""
