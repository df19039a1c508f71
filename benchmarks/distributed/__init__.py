"""Attention to keys that are spread over processes: what travels, what overlaps, how it scales."""
