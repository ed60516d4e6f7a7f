"""The experiments on images: flags, samples, figures and tables."""
