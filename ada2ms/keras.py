"""The same as `ada2ms.tf`, under the name that those look for who use Keras without TensorFlow."""

from ada2ms.tf import *  # noqa: F403
