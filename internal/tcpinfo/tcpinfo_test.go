package tcpinfo

import (
	"bytes"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

func FuzzQueueTime(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(make([]byte, ConnEnd))
	whole := bytes.Repeat([]byte{1}, ConnEnd)
	f.Add(whole)
	f.Add(whole[:LastDataSent+4])
	f.Fuzz(func(t *testing.T, info []byte) {
		d, err := QueueTime(info)
		if (err == nil) != (d >= 0) || err != nil && d != sys.Unknown {
			t.Fatal(d, err)
		}
		if err == nil && d%time.Millisecond != 0 {
			t.Fatal(d)
		}
		if err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, syscall.EINVAL) {
			t.Fatal(err)
		}
	})
}
