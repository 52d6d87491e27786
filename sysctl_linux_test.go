package acceptq

import (
	"io/fs"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// A ceiling that cannot be read is unknown, the error says which, and listening
// works all the same.
func TestCeilingUnreadable(t *testing.T) {
	for _, tt := range []struct {
		rule string
		text string
		err  error // of reading the file
		want error
	}{
		{"no file", "", &fs.PathError{Op: "open", Path: "/proc/sys/net/core/somaxconn", Err: fs.ErrNotExist}, fs.ErrNotExist},
		{"no number in it", "many\n", nil, strconv.ErrSyntax},
		{"a number out of range", "-1\n", nil, strconv.ErrRange},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			sys := realSystem
			sys.readFile = func(string) ([]byte, error) { return []byte(tt.text), tt.err }
			predicted, err := sys.predict(100)
			require.ErrorIs(t, err, tt.want)
			require.ErrorContains(t, err, "/proc/sys/net/core/somaxconn")
			require.Equal(t, Backlog{Requested: 100, Ceiling: unknown, Limit: unknown, Effective: unknown, Capacity: unknown}, predicted)

			ln, err := sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(1)})
			require.NoError(t, err)
			defer ln.Close()
			require.Equal(t, Backlog{Requested: 1, Ceiling: unknown, Limit: 1, Effective: 1, Capacity: 2, Measured: true}, ln.Backlog())
		})
	}
}
