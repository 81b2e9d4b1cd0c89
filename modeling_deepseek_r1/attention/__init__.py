"""Attention: which keys a query sees (pattern), the reference, the blockwise implementation, cache and layer."""
