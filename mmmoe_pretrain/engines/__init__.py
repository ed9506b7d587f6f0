"""Engines that step a model: gradient reduction, clipping, optimizer."""
