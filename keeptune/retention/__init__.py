"""What must not be lost: texts, losses and their bounds arrive and leave; the certificate is made here."""
