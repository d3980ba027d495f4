"""Diffusion mathematics over a callable denoiser: objectives, guidance and samplers."""
