"""What trainings on images share: changes of images, checkpoints' configs, and convolutional networks."""
