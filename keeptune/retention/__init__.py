"""What was forgotten, and the certificate that it was no more than the budget."""
