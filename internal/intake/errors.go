package intake

import "errors"

// ErrStillOpen is the error of a drain that has ended but does not keep new clients out.
var ErrStillOpen = errors.New("new clients are still let in")

// ErrShared is the error of a drain of a socket that has, or may have, another holder.
var ErrShared = errors.New("the socket may have another holder")
