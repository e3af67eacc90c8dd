"""Encoders (timm underneath) and the heads that methods put on them."""
