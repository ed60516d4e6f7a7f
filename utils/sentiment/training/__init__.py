"""Training of classifiers of sentences, plain or against the replacement of words."""
