"""Distil any timm teacher into any timm student with Instance Relationship Graphs (Liu et al., CVPR 2019)."""

__version__ = "0.1.0"
