"""What trainings on images share: changes of images, and convolutional networks."""
