package sockdiag

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestParseDump(t *testing.T) {
	msg := make([]byte, DiagMsgSize)
	msg[DiagFamily] = unix.AF_INET
	odd := append(msg[:DiagMsgSize:DiagMsgSize], 5, 0, 0, 0, 1) // with an attribute of one byte
	binary.NativeEndian.PutUint16(odd[DiagMsgSize:], 5)
	one := testkit.Message(unix.SOCK_DIAG_BY_FAMILY, msg)
	end := testkit.Message(unix.NLMSG_DONE, make([]byte, 4))
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
		{"other messages are skipped", join(testkit.Message(unix.NLMSG_NOOP, nil), one), 1, false, nil},
		{"a row of odd length", join(testkit.Message(unix.SOCK_DIAG_BY_FAMILY, odd), one), 2, false, nil},
		{"a last row without padding", join(one, testkit.Message(unix.SOCK_DIAG_BY_FAMILY, odd)[:unix.SizeofNlMsghdr+len(odd)]), 2, false, nil},
		{"a short row", join(one, testkit.Message(unix.SOCK_DIAG_BY_FAMILY, msg[:DiagMsgSize-1])), 0, false, unix.EBADMSG},
		{"an error", testkit.Message(unix.NLMSG_ERROR, number(-int32(unix.ENOENT))), 0, false, unix.ENOENT},
		{"an end that reports an error", join(one, testkit.Message(unix.NLMSG_DONE, number(-int32(unix.ENOENT)))), 0, false, unix.ENOENT},
		{"without the module", testkit.Message(unix.NLMSG_DONE, number(-int32(unix.ENOENT))), 0, false, errors.ErrUnsupported},
		{"an end without a number", testkit.Message(unix.NLMSG_DONE, nil), 0, false, unix.EBADMSG},
		{"an end with the size of a list", testkit.Message(unix.NLMSG_DONE, number(8)), 0, true, nil},
		{"an error without a number", testkit.Message(unix.NLMSG_ERROR, nil), 0, false, unix.EBADMSG},
		{"half a header", one[:15], 0, false, unix.EBADMSG},
		{"half a row", one[:20], 0, false, unix.EBADMSG},
		{"a length of 0", make([]byte, 16), 0, false, unix.EBADMSG},
		{"a length beyond the data", binary.NativeEndian.AppendUint32(nil, 1<<32-1), 0, false, unix.EBADMSG},
	} {
		t.Run(test.name, func(t *testing.T) {
			rows := 0
			done, err := parseDump(test.p, func(Row) { rows++ })
			if test.err != nil {
				require.ErrorIs(t, err, test.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, test.rows, rows)
			require.Equal(t, test.done, done)
		})
	}
}

func keepAll(Row) bool { return true }

// If the kernel never ends a dump, reading it still ends, so a drain does not hang.
func TestReadDumpEnds(t *testing.T) {
	row := testkit.Message(unix.SOCK_DIAG_BY_FAMILY, make([]byte, DiagMsgSize))
	end := testkit.Message(unix.NLMSG_DONE, make([]byte, 4))
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
		"no rows, forever":  {func(_ int, p []byte) (int, error) { return copy(p, testkit.Message(unix.NLMSG_NOOP, nil)), nil }, 0, context.DeadlineExceeded},
		"no answer in time": {func(int, []byte) (int, error) { return 0, unix.EAGAIN }, 0, context.DeadlineExceeded},
		"an error half-way": {func(turn int, p []byte) (int, error) { return copy(p, [][]byte{row, end[:9]}[turn]), nil }, 0, unix.EBADMSG},
	} {
		t.Run(name, func(t *testing.T) {
			turn := -1
			rows, err := readDump(testkit.Within(t, 10*time.Millisecond), keepAll, func(p []byte) (int, error) {
				turn++
				return test.receive(turn, p)
			})
			require.ErrorIs(t, err, test.err)
			require.Len(t, rows, test.rows)
		})
	}
}

func FuzzParseDump(f *testing.F) {
	one := testkit.Message(unix.SOCK_DIAG_BY_FAMILY, make([]byte, DiagMsgSize))
	end := testkit.Message(unix.NLMSG_DONE, make([]byte, 4))
	f.Add([]byte(nil))
	f.Add(one)
	f.Add(append(one[:len(one):len(one)], end...))
	f.Add(testkit.Message(unix.NLMSG_ERROR, []byte{0xfe, 0xff, 0xff, 0xff}))
	f.Add(testkit.Message(unix.SOCK_DIAG_BY_FAMILY, []byte("odd")))
	f.Add(Request{unix.AF_INET, 80, 1 << tcpinfo.SynRecv, 0}.message())
	f.Add(one[:30])
	f.Fuzz(func(t *testing.T, p []byte) {
		whole := string(p)
		size := 0
		done, err := parseDump(p, func(r Row) { size += unix.SizeofNlMsghdr + DiagMsgSize + len(r.Info) })
		if string(p) != whole {
			t.Fatal("parseDump wrote into the datagram")
		}
		if err != nil && done {
			t.Fatal("an error together with the end")
		}
		if size > len(p) {
			t.Fatalf("%d bytes of rows out of %d", size, len(p))
		}
	})
}

func TestParseRow(t *testing.T) {
	p := make([]byte, DiagMsgSize)
	p[DiagFamily], p[DiagState] = unix.AF_INET6, tcpinfo.Listen
	copy(p[DiagSource:], netip.MustParseAddr("2001:db8::1").AsSlice())
	copy(p[DiagDest:], netip.MustParseAddr("::ffff:10.0.0.2").AsSlice())
	binary.BigEndian.PutUint16(p[diagLocal:], 80)
	binary.BigEndian.PutUint16(p[DiagClient:], 4000)
	for i, offset := range []int{diagInterface, diagRqueue, diagWqueue, diagUID, DiagInode} {
		binary.NativeEndian.PutUint32(p[offset:], uint32(i+1))
	}
	binary.NativeEndian.PutUint64(p[DiagCookie:], 6)
	want := Row{
		SocketID: SocketID{
			Family: unix.AF_INET6, Device: 1,
			Local: netip.MustParseAddrPort("[2001:db8::1]:80"), Client: netip.MustParseAddrPort("10.0.0.2:4000"),
		},
		State: tcpinfo.Listen, Rqueue: 2, Wqueue: 3, UID: 4, Inode: 5, Cookie: 6, Drops: sys.Unknown,
	}
	got, err := ParseRow(p)
	require.NoError(t, err)
	require.Equal(t, want, got)
	got, err = ParseRow(slices.Concat(p, testkit.AttributeOf(1, 1, 2, 3), testkit.AttributeOf(diagSKV6Only, 1), testkit.AttributeOf(DiagInfo, 7, 8)))
	require.NoError(t, err)
	want.V6Only, want.Info = true, []byte{7, 8}
	require.Equal(t, want, got)

	memory := bytes.Repeat([]byte{0xff}, sys.MemInfoEnd) // the largest number of each kind
	got, err = ParseRow(slices.Concat(p, testkit.AttributeOf(DiagMemInfo, memory...)))
	require.NoError(t, err)
	require.Equal(t, int64(math.MaxUint32), got.Drops)
	got, err = ParseRow(slices.Concat(p, testkit.AttributeOf(DiagMemInfo, memory[1:]...)))
	require.NoError(t, err)
	require.EqualValues(t, sys.Unknown, got.Drops, "a kernel without the number")

	copy(p[DiagSource:], []byte{127, 0, 0, 1})
	p[DiagFamily] = unix.AF_INET
	got, err = ParseRow(p)
	require.NoError(t, err)
	require.Equal(t, netip.MustParseAddrPort("127.0.0.1:80"), got.Local)
	for name, p := range map[string][]byte{
		"empty":                       nil,
		"short":                       p[:DiagMsgSize-1],
		"an attribute too short":      slices.Concat(p, []byte{3, 0, 3, 0}),
		"an attribute beyond the row": slices.Concat(p, []byte{9, 9, 1, 0}),
	} {
		got, err := ParseRow(p)
		require.ErrorIs(t, err, unix.EBADMSG, name)
		require.Zero(t, got, name)
	}
}
