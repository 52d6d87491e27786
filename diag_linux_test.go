package acceptq

import (
	"context"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// message returns a netlink message.
func message(kind uint16, body []byte) []byte {
	p := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body)+3)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)+len(body)))
	binary.NativeEndian.PutUint16(p[4:], kind)
	p = append(p, body...)
	return append(p, make([]byte, -len(p)&3)...)
}

func TestParseDump(t *testing.T) {
	row := make([]byte, diagMsgSize)
	row[diagFamily] = unix.AF_INET
	one := message(unix.SOCK_DIAG_BY_FAMILY, row)
	end := message(unix.NLMSG_DONE, make([]byte, 4))
	number := func(n int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(n)) }
	join := func(parts ...[]byte) (p []byte) {
		for _, part := range parts {
			p = append(p, part...)
		}
		return p
	}
	for _, test := range []struct {
		name string
		p    []byte
		rows int
		done bool
		err  error
	}{
		{"nothing", nil, 0, false, nil},
		{"a row, and more to come", one, 1, false, nil},
		{"the end", end, 0, true, nil},
		{"rows and the end", join(one, one, end), 2, true, nil},
		{"data after the end are ignored", join(one, end, []byte{1}), 1, true, nil},
		{"other messages are skipped", join(message(unix.NLMSG_NOOP, nil), one), 1, false, nil},
		{"a row of odd length", join(message(unix.SOCK_DIAG_BY_FAMILY, row[:5]), one), 2, false, nil},
		{"a last row without padding", join(one, message(unix.SOCK_DIAG_BY_FAMILY, row[:5])[:21]), 2, false, nil},
		{"an error", message(unix.NLMSG_ERROR, number(-int32(unix.ENOENT))), 0, false, unix.ENOENT},
		{"an error without a number", message(unix.NLMSG_ERROR, nil), 0, false, unix.EBADMSG},
		{"half a header", one[:15], 0, false, unix.EBADMSG},
		{"half a row", one[:20], 0, false, unix.EBADMSG},
		{"a length of 0", make([]byte, 16), 0, false, unix.EBADMSG},
		{"a length beyond the data", binary.NativeEndian.AppendUint32(nil, 1<<32-1), 0, false, unix.EBADMSG},
	} {
		t.Run(test.name, func(t *testing.T) {
			rows, done, err := parseDump(test.p)
			if test.err != nil {
				require.ErrorIs(t, err, test.err)
				return
			}
			require.NoError(t, err)
			require.Len(t, rows, test.rows)
			require.Equal(t, test.done, done)
		})
	}
}

// If the kernel never ends a dump, reading it still ends, so a drain does not hang.
func TestReadDumpEnds(t *testing.T) {
	row := message(unix.SOCK_DIAG_BY_FAMILY, make([]byte, diagMsgSize))
	end := message(unix.NLMSG_DONE, make([]byte, 4))
	for name, test := range map[string]struct {
		receive func(turn int, p []byte) (int, error)
		rows    int
		err     error
	}{
		"in two datagrams, after a signal": {func(turn int, p []byte) (int, error) {
			if turn == 1 {
				return 0, unix.EINTR
			}
			return copy(p, [][]byte{row, nil, end}[turn]), nil
		}, 1, nil},
		"nothing, forever":  {func(int, []byte) (int, error) { return 0, nil }, 0, unix.EBADMSG},
		"signals, forever":  {func(int, []byte) (int, error) { return 0, unix.EINTR }, 0, context.DeadlineExceeded},
		"no rows, forever":  {func(_ int, p []byte) (int, error) { return copy(p, message(unix.NLMSG_NOOP, nil)), nil }, 0, context.DeadlineExceeded},
		"no answer in time": {func(int, []byte) (int, error) { return 0, unix.EAGAIN }, 0, context.DeadlineExceeded},
		"an error half-way": {func(turn int, p []byte) (int, error) { return copy(p, [][]byte{row, end[:9]}[turn]), nil }, 0, unix.EBADMSG},
	} {
		t.Run(name, func(t *testing.T) {
			turn := -1
			rows, err := readDump(within(t, 10*time.Millisecond), func([]byte) bool { return true }, func(p []byte) (int, error) {
				turn++
				return test.receive(turn, p)
			})
			require.ErrorIs(t, err, test.err)
			require.Len(t, rows, test.rows)
		})
	}
}

func FuzzParseDump(f *testing.F) {
	one := message(unix.SOCK_DIAG_BY_FAMILY, make([]byte, diagMsgSize))
	end := message(unix.NLMSG_DONE, make([]byte, 4))
	f.Add([]byte(nil))
	f.Add(one)
	f.Add(append(one[:len(one):len(one)], end...))
	f.Add(message(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Add(message(unix.SOCK_DIAG_BY_FAMILY, []byte("odd")))
	f.Add(diagRequest(unix.AF_INET, 80, 1<<tcpSynRecv))
	f.Add(one[:30])
	f.Fuzz(func(t *testing.T, p []byte) {
		whole := string(p)
		rows, done, err := parseDump(p)
		if string(p) != whole {
			t.Fatal("parseDump wrote into the datagram")
		}
		if err != nil && (rows != nil || done) {
			t.Fatal("an error together with an answer")
		}
		var size int
		for _, row := range rows {
			size += unix.SizeofNlMsghdr + len(row)
		}
		if size > len(p) {
			t.Fatalf("%d bytes of rows out of %d", size, len(p))
		}
		// Only the rows are counted, whatever they contain.
		k := realKernel
		k.diag = func(context.Context, []byte) ([][]byte, error) { return rows, nil }
		if found, err := k.handshakes(t.Context(), []uint8{unix.AF_INET, unix.AF_INET6}, 80); err == nil && len(found) > len(rows) {
			t.Fatal("more handshakes than rows")
		}
	})
}

func TestParseMember(t *testing.T) {
	row := make([]byte, diagMsgSize)
	row[diagFamily], row[diagSource], row[diagInterface], row[diagUID], row[diagInode] = unix.AF_INET6, 9, 1, 2, 3
	if row[diagInode+3] != 0 {
		t.Skip("big-endian")
	}
	want := member{3, group{family: unix.AF_INET6, addr: [16]byte{9}, device: 1, uid: 2}}
	attribute := func(kind byte, value ...byte) []byte {
		p := append([]byte{byte(4 + len(value)), 0, kind, 0}, value...)
		return append(p, make([]byte, -len(p)&3)...)
	}
	got, err := parseMember(row)
	require.NoError(t, err)
	require.Equal(t, want, got)
	got, err = parseMember(slices.Concat(row, attribute(1, 1, 2, 3), attribute(diagSKV6Only, 1)))
	require.NoError(t, err)
	want.group.v6only = 1
	require.Equal(t, want, got)
	for name, p := range map[string][]byte{
		"short":                       row[:diagMsgSize-1],
		"an attribute too short":      slices.Concat(row, []byte{3, 0, 1, 0}),
		"an attribute beyond the row": slices.Concat(row, []byte{9, 0, 1, 0}),
	} {
		_, err := parseMember(p)
		require.ErrorIs(t, err, unix.EBADMSG, name)
	}
}
