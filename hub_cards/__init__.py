"""What a checkpoint has to be published: its card, the list of its files, what checks them and what uploads them."""
