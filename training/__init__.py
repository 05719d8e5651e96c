"""Training: a recipe a method, on `transformers.Trainer`, PEFT and accelerate."""
