#!/bin/sh
# The compiler for DeepSpeed's own libraries: without debug information they are built in two thirds of the time.
exec c++ "$@" -g0
