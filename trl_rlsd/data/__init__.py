"""Datasets with a privileged column. Each module makes one kind; all need an extra of their own."""
