"""The engine: batched generation over the latent cache, sampling, scoring."""
