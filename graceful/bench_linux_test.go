package graceful

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkKeptAlive measures a request on a kept-alive connection, with its client: the
// processor time of the whole process, and its allocations. Use -cpu 1 to compare the two: with
// more processors the scheduler decides, and the time of the same server varies more than the
// two differ.
func BenchmarkKeptAlive(b *testing.B) {
	for _, how := range []string{"net", "graceful"} {
		b.Run("how="+how, func(b *testing.B) {
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			require.NoError(b, err)
			ctx, stop := context.WithCancel(context.Background())
			srv := &http.Server{Handler: hello}
			done := make(chan error, 1)
			go func() {
				if how == "net" {
					done <- srv.Serve(ln)
				} else {
					done <- Serve(ctx, srv, ln, WithLinger(0))
				}
			}()
			nc, err := net.Dial("tcp", ln.Addr().String())
			require.NoError(b, err)
			answers := bufio.NewReader(nc)
			request, answer := []byte(get), make([]byte, 4<<10)
			n := 0
			b.ReportAllocs()
			began := processorTime(b)
			for b.Loop() {
				if _, err := nc.Write(request); err != nil {
					b.Fatal(err)
				}
				if n == 0 { // the length of each answer
					resp, err := http.ReadResponse(answers, nil)
					require.NoError(b, err)
					n = headerLen(resp) + 5
					io.Copy(io.Discard, resp.Body)
					continue
				}
				if _, err := io.ReadFull(answers, answer[:n]); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(processorTime(b)-began)/float64(b.N), "cpu-ns/op")
			nc.Close()
			stop()
			if how == "net" {
				srv.Close()
			}
			<-done
		})
	}
}

// headerLen returns the length of the header of an answer to get.
func headerLen(resp *http.Response) int {
	n := len("HTTP/1.1 200 OK\r\n\r\n")
	for name, values := range resp.Header {
		for _, v := range values {
			n += len(name) + len(": ") + len(v) + len("\r\n")
		}
	}
	return n
}

func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
