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
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
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

// visitors use a new connection for each request, or keep one as long as the server lets
// them. They POST a body that cannot be sent twice, so that the client cannot hide a lost
// request by repeating it.
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

// If the successor listens before the old process stops, a restart loses no request, with
// every protocol.
func TestOverlappingRestarts(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			lost := restarts(t, protocol, "Serve", 4)
			require.Zero(t, lost.lost.Load(), lost)
		})
	}
}

// With Shutdown alone some requests are lost. This shows that the load is high enough.
func TestOverlappingRestartsWithShutdown(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			require.NotZero(t, restarts(t, protocol, "Shutdown", 4).lost.Load())
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
		served := c.served.Load()
		until(t, "requests", func() bool { return c.served.Load() > served+200 })
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

// The descriptor is passed on, as with systemd. Each process closes its own at the start of
// its stop, and no client notices.
func TestRestartsOfASharedSocket(t *testing.T) {
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
			for range 4 {
				served := c.served.Load()
				until(t, "requests", func() bool { return c.served.Load() > served+200 })
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
}
