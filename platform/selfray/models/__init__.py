"""Encoders, built on timm, and the heads that methods add to them."""
