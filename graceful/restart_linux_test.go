package graceful

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/stretchr/testify/require"
)

// The environment variables of a server process.
const (
	addrEnv     = programEnv + "_ADDR"
	protocolEnv = programEnv + "_PROTOCOL"
	howEnv      = programEnv + "_HOW"
)

// serverProgram serves until SIGTERM and prints its address once it listens.
func serverProgram() error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	var served atomic.Bool
	srv, serve := serverOf(os.Getenv(protocolEnv), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served.Store(true)
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "hello")
	}))
	var ln net.Listener
	var err error
	opts := []Option{}
	switch os.Getenv(howEnv) {
	case "passed":
		ln, err = net.FileListener(os.NewFile(3, "listener"))
		opts = append(opts, WithSharedSocket())
	case "unsteered":
		ln, err = acceptq.ListenTCP(os.Getenv(addrEnv), acceptq.WithReusePort(), acceptq.WithoutSteering())
	default:
		ln, err = acceptq.ListenTCP(os.Getenv(addrEnv), acceptq.WithReusePort())
	}
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr())
	if os.Getenv(howEnv) == "Shutdown" {
		go func() {
			<-ctx.Done()
			srv.Shutdown(context.Background())
		}()
		if srv.TLSConfig != nil {
			err = srv.ServeTLS(ln, "", "")
		} else {
			err = srv.Serve(ln)
		}
		if errors.Is(err, http.ErrServerClosed) {
			err = nil
		}
		return err
	}
	return serve(ctx, srv, ln, opts...)
}

// A process is a running server.
type process struct {
	cmd  *exec.Cmd
	addr string
	err  *strings.Builder
}

// startProcess returns when the server listens.
func startProcess(t *testing.T, addr, protocol, how string, shared *os.File) *process {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	p := &process{cmd: exec.Command(self), err: new(strings.Builder)}
	p.cmd.Env = append(os.Environ(), programEnv+"=server", addrEnv+"="+addr, protocolEnv+"="+protocol, howEnv+"="+how,
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // otherwise each process ends a second later under -race
	p.cmd.Stderr = p.err
	if shared != nil {
		p.cmd.ExtraFiles = []*os.File{shared}
	}
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "%v", p.err)
	p.addr = strings.TrimSpace(line)
	return p
}

// end stops the server, which must report no error.
func (p *process) end(t *testing.T) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	late := time.AfterFunc(time.Minute, func() { p.cmd.Process.Kill() })
	defer late.Stop()
	require.NoError(t, p.cmd.Wait(), "%v", p.err)
}

// A crowd is a number of clients that send requests repeatedly until home is closed.
type crowd struct {
	wait               sync.WaitGroup
	home               chan struct{}
	served, lost, slow atomic.Int64
	first              sync.Once
	failure            error
}

func (c *crowd) String() string {
	return fmt.Sprintf("%d served, %d lost (%v), %d waited for more than 900 ms", c.served.Load(), c.lost.Load(), c.failure, c.slow.Load())
}

// add adds n clients. visitor makes a function for each client, which the client calls for
// each request.
func (c *crowd) add(n int, visitor func() (visit func() error, leave func())) {
	for range n {
		c.wait.Go(func() {
			visit, leave := visitor()
			defer leave()
			for {
				select {
				case <-c.home:
					return
				default:
				}
				began := time.Now()
				if err := visit(); err != nil {
					c.lost.Add(1)
					c.first.Do(func() { c.failure = err })
					continue
				}
				c.served.Add(1)
				if time.Since(began) > 900*time.Millisecond {
					c.slow.Add(1)
				}
			}
		})
	}
}

// more waits until n more requests were served.
func (c *crowd) more(t *testing.T, n int64) {
	t.Helper()
	served := c.served.Load()
	until(t, "requests", func() bool { return c.served.Load() > served+n })
}

// visitors come with a connection for each request, or keep theirs as long as the
// server lets them. They POST a body that cannot be sent twice, so that no request
// that is lost is repeated.
func visitors(protocol, addr string, keepAlive bool, pause time.Duration) func() (func() error, func()) {
	return func() (func() error, func()) {
		tr, scheme := transportOf(protocol)
		tr.DisableKeepAlives = !keepAlive
		return func() error {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			body := struct{ io.Reader }{strings.NewReader("x")}
			req, err := http.NewRequestWithContext(ctx, "POST", scheme+"://"+addr, body)
			if err != nil {
				return err
			}
			req.ContentLength = 1
			resp, err := tr.RoundTrip(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			text, err := io.ReadAll(resp.Body)
			if err == nil && string(text) != "hello" {
				err = fmt.Errorf("answer %q", text)
			}
			if pause > 0 {
				time.Sleep(pause)
			}
			return err
		}, tr.CloseIdleConnections
	}
}

// rounds is how many times a test repeats what it needs often to show something. The
// environment variable ACCEPTQ_ROUNDS multiplies it.
func rounds(n int) int {
	if factor, err := strconv.Atoi(os.Getenv("ACCEPTQ_ROUNDS")); err == nil && factor > 1 {
		return n * factor
	}
	return n
}

// Restarts in which the successor listens before the old process stops lose nothing
// and stall nobody, whatever the clients speak. Without steering some clients send
// their SYN again, and Shutdown alone loses some: the test has a load.
func TestOverlappingRestarts(t *testing.T) {
	for _, how := range []string{"Serve", "unsteered", "Shutdown"} {
		t.Run(how, func(t *testing.T) {
			testkit.InNamespace(t, func(t *testing.T) {
				before := testkit.KernelCounter(t, "TCPSynRetrans")
				var lost, slow atomic.Int64
				t.Run("protocol", func(t *testing.T) {
					for _, protocol := range protocols {
						t.Run(protocol, func(t *testing.T) {
							t.Parallel()
							c := restarts(t, protocol, how, rounds(2))
							lost.Add(c.lost.Load())
							slow.Add(c.slow.Load())
						})
					}
				})
				again := testkit.KernelCounter(t, "TCPSynRetrans") - before
				t.Logf("%s: %d lost, %d waited for more than 900 ms, %d SYNs sent again", how, lost.Load(), slow.Load(), again)
				switch how {
				case "Serve":
					require.Zero(t, lost.Load())
					require.Zero(t, again)
				case "unsteered":
					require.Zero(t, lost.Load())
					require.NotZero(t, again)
				case "Shutdown":
					require.NotZero(t, lost.Load())
				}
			})
		})
	}
}

func restarts(t *testing.T, protocol, how string, n int) *crowd {
	old := startProcess(t, "127.0.0.1:0", protocol, how, nil)
	c := &crowd{home: make(chan struct{})}
	c.add(8, visitors(protocol, old.addr, false, 0))
	c.add(8, visitors(protocol, old.addr, true, 0))
	c.add(8, visitors(protocol, old.addr, true, 20*time.Millisecond))
	for range n {
		c.more(t, 200)
		next := startProcess(t, old.addr, protocol, how, nil)
		old.end(t)
		old = next
	}
	close(c.home) // the last server serves the clients until they end
	c.wait.Wait()
	old.end(t)
	t.Logf("%s, %s, %d restarts: %v", protocol, how, n, c)
	return c
}

// A listener that was drained is closed at once. Otherwise a process that comes next
// would have its clients sent to it, by taking the program off the group, as long as a
// connection without a request holds up the stop.
func TestNoStallAfterTheDrain(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort())
		require.NoError(t, err)
		log := new(journal)
		old := start(t, &http.Server{Handler: hello}, ln, log.option(), part(time.Minute), WithTimeout(time.Hour))
		silent := dial(t, old.addr)
		until(t, "the silent connection", func() bool { s, err := ln.Stats(); return err == nil && s.Queued == 0 })
		var others []*running
		newcomer := func() {
			ln, err := acceptq.ListenTCP(old.addr, acceptq.WithReusePort())
			require.NoError(t, err)
			others = append(others, start(t, &http.Server{Handler: hello}, ln))
		}
		newcomer()
		old.stop()
		log.after(t, "drained")
		newcomer()
		before := testkit.KernelCounter(t, "TCPSynRetrans")
		for range 64 {
			c := dial(t, old.addr)
			c.send(get)
			_, body := c.answer()
			require.Equal(t, "hello", body)
			c.Close()
		}
		require.Zero(t, testkit.KernelCounter(t, "TCPSynRetrans")-before)
		silent.Close()
		require.NoError(t, old.wait())
		for _, r := range others {
			r.stop()
			require.NoError(t, r.wait())
		}
	})
}

// Shards hand over to more and fewer shards, generation after generation, whether they are
// served together or each is wrapped in another listener.
func TestOverlappingRestartsOfShards(t *testing.T) {
	for _, how := range []string{"together", "wrapped"} {
		t.Run(how, func(t *testing.T) {
			testkit.InNamespace(t, func(t *testing.T) {
				begin := func(addr string, n int) *running {
					shards, err := acceptq.ListenTCPShards(addr, n, acceptq.WithReusePort())
					require.NoError(t, err)
					if how == "together" {
						return start(t, &http.Server{Handler: hello}, shards)
					}
					var each []Listener
					for l := range shards.All() {
						each = append(each, &wrapped{l})
					}
					return start(t, &http.Server{Handler: hello}, each[0], WithListener(each[1:]...))
				}
				old := begin("127.0.0.1:0", 3)
				c := &crowd{home: make(chan struct{})}
				c.add(16, visitors("HTTP/1", old.addr, false, 0))
				before := testkit.KernelCounter(t, "TCPSynRetrans")
				for range rounds(1) {
					for _, n := range []int{8, 2, 4, 3} {
						c.more(t, 100)
						next := begin(old.addr, n)
						old.stop()
						require.NoError(t, old.wait())
						old = next
					}
				}
				c.more(t, 100)
				close(c.home)
				c.wait.Wait()
				old.stop()
				require.NoError(t, old.wait())
				again := testkit.KernelCounter(t, "TCPSynRetrans") - before
				t.Logf("%v, %d SYNs sent again", c, again)
				require.Zero(t, c.lost.Load(), c)
				require.LessOrEqual(t, again, int64(3*rounds(1))) // a close leaves a moment now and then
			})
		})
	}
}

// Shards close in the order that other processes of the group expect: one that drains
// afterwards leads its clients away, and does not keep them.
func TestShardsCloseInOrder(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2, acceptq.WithReusePort())
		require.NoError(t, err)
		old := start(t, &http.Server{Handler: hello}, shards)
		var others []*acceptq.Listener
		for range 3 {
			ln, err := acceptq.ListenTCP(old.addr, acceptq.WithReusePort())
			require.NoError(t, err)
			defer ln.Close()
			go http.Serve(ln, hello)
			others = append(others, ln)
		}
		old.stop()
		require.NoError(t, old.wait())
		require.NoError(t, others[2].Drain(t.Context()))
		before := testkit.KernelCounter(t, "TCPSynRetrans")
		for range 64 {
			c := dial(t, old.addr)
			c.send(get)
			_, body := c.answer()
			require.Equal(t, "hello", body)
			c.Close()
		}
		require.Zero(t, testkit.KernelCounter(t, "TCPSynRetrans")-before)
	})
}

// A descriptor that is passed on, as by systemd: each process closes its own at the
// start of its stop, and nobody notices.
func TestRestartsOfASharedSocket(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		before := testkit.KernelCounter(t, "TCPSynRetrans")
		t.Run("protocol", func(t *testing.T) {
			for _, protocol := range protocols {
				t.Run(protocol, func(t *testing.T) {
					t.Parallel()
					ln, err := net.Listen("tcp", "127.0.0.1:0")
					require.NoError(t, err)
					f, err := ln.(*net.TCPListener).File()
					require.NoError(t, err)
					defer f.Close()
					ln.Close()
					old := startProcess(t, "", protocol, "passed", f)
					c := &crowd{home: make(chan struct{})}
					c.add(8, visitors(protocol, old.addr, false, 0))
					c.add(8, visitors(protocol, old.addr, true, 0))
					for range rounds(2) {
						c.more(t, 200)
						next := startProcess(t, "", protocol, "passed", f)
						old.end(t)
						old = next
					}
					close(c.home)
					c.wait.Wait()
					old.end(t)
					t.Log(c)
					require.Zero(t, c.lost.Load(), c)
				})
			}
		})
		require.Zero(t, testkit.KernelCounter(t, "TCPSynRetrans")-before)
	})
}
