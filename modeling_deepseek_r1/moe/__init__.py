"""Mixture of experts: routers, experts, their products, their losses and metrics."""
