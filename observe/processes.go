package observe

import "context"

// A Process holds a socket.
type Process struct {
	PID int `json:"pid"`
	// Name is the content of /proc/PID/comm: the first 15 bytes of the name of the program,
	// unless the program has changed it. It is valid UTF-8.
	Name string `json:"name"`
}

// Processes returns the processes that hold a socket, sorted by PID, for each inode of
// [acceptq.Queue]. A socket can have several holders: nginx and its workers share theirs.
//
// complete is false if there are processes that the caller may not read, which is usual for
// those of other users. Usually only root may read all. A missing holder proves nothing then. Even if
// complete is true, a socket has no holder here if
//   - the kernel uses it
//   - its process is outside the PID namespace of the caller
//   - only a thread with a descriptor table of its own has it, unshare(2)
//   - it is on its way in a Unix socket, unix(7)
//
// The call reads a link of /proc for each descriptor of each process. If ctx ends, it stops
// early and returns its error. On systems other than Linux the error matches
// [errors.ErrUnsupported].
func Processes(ctx context.Context, inodes ...uint64) (holders map[uint64][]Process, complete bool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	wanted := make(map[uint64]int, len(inodes))
	for _, inode := range inodes {
		wanted[inode] = 0
	}
	delete(wanted, 0) // a socket without a number
	if len(wanted) == 0 {
		return map[uint64][]Process{}, true, nil
	}
	return processes(ctx, wanted)
}
