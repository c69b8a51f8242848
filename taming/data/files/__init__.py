"""Files that data sets read: images, label maps, depth."""
