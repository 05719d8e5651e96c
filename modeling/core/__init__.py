"""What every compressed model is made of, whatever its method and backbone."""
