"""The stages: a visible loop each, one shared optimiser step, and the road that joins them."""
