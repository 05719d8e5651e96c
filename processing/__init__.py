"""Processors: text, images and questions to model inputs."""
