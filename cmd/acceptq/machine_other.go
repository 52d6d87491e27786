//go:build !linux

package main

import (
	"context"
	"errors"
	"os"
)

// This file is for the systems that do not list the accept queues of other processes. What
// the command asks there ends with the error of acceptq.Queues.

func windowSize(*os.File) (columns, rows int) { return 0, 0 }

func otherPlaces() ([]place, []string, error) { return nil, nil, nil }

func socketsOn(context.Context, uint16) ([]connection, error) { return nil, errors.ErrUnsupported }

func dialPorts() (low, high int, reserved string) { return 0, 0, "" }

func isStopped(int) bool { return false }
