"""What the recipes share: data, networks, published figures, and the run itself."""
