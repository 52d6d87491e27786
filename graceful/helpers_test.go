package graceful

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) != "" {
		if err := serverProgram(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testkit.Parallel(8)
	goleak.VerifyTestMain(m)
}

// programEnv is set when a test starts the test binary as a server process.
const programEnv = "ACCEPTQ_TEST_GRACEFUL"

// patience is how long a test waits for an event that must happen.
const patience = 20 * time.Second

// A running server, and how to stop it.
type running struct {
	t      *testing.T
	srv    *http.Server
	addr   string
	stop   context.CancelFunc
	result chan error
}

// listen opens a listener that is closed when the test ends.
func listen(t *testing.T) *acceptq.Listener {
	t.Helper()
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// start serves srv on ln until the test stops it.
func start(t *testing.T, srv *http.Server, ln Listener, opts ...Option) *running {
	t.Helper()
	r := begin(t, ln, func(ctx context.Context) error { return Serve(ctx, srv, ln, opts...) })
	r.srv = srv
	return r
}

// conns returns what Serve knows about the connections.
func (r *running) conns() *conns {
	replacing.Lock()
	defer replacing.Unlock()
	if h, ok := r.srv.Handler.(*httpServer); ok {
		return &h.conns
	}
	return new(conns)
}

func (r *running) counts() counts { return r.conns().look(0) }

// turningAway waits until the server closes connections after their answer.
func (r *running) turningAway() {
	r.t.Helper()
	until(r.t, "the stop", func() bool { return r.conns().stopping.Load() })
}

func begin(t *testing.T, ln Listener, serve func(context.Context) error) *running {
	ctx, stop := context.WithCancel(context.Background())
	r := &running{t: t, addr: ln.Addr().String(), stop: stop, result: make(chan error, 1)}
	go func() { r.result <- serve(ctx) }()
	t.Cleanup(stop)
	return r
}

// wait returns the error of Serve.
func (r *running) wait() error {
	r.t.Helper()
	select {
	case err := <-r.result:
		return err
	case <-time.After(patience):
		require.FailNow(r.t, "Serve does not return")
		return nil
	}
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, patience, time.Millisecond, what)
}

// A client has one connection and never repeats a request.
type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func dial(t *testing.T, addr string) *client {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	return newClient(t, c)
}

func newClient(t *testing.T, c net.Conn) *client { return &client{t, c, bufio.NewReader(c)} }

func (c *client) send(request string) {
	c.t.Helper()
	_, err := io.WriteString(c, request)
	require.NoError(c.t, err)
}

const get = "GET / HTTP/1.1\r\nHost: test\r\n\r\n"

// answer reads the answer to a GET.
func (c *client) answer() (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	require.NoError(c.t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(c.t, err)
	resp.Body.Close()
	return resp, string(body)
}

// closed waits until the server has closed the connection.
func (c *client) closed() {
	c.t.Helper()
	_, err := c.r.ReadByte()
	require.Error(c.t, err)
	require.False(c.t, errors.Is(err, os.ErrDeadlineExceeded), "still open")
}

var hello = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })

var certificate = sync.OnceValues(func() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"test"},
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
})

// tlsConfig is the configuration of a TLS server. Clients use trusting.
func tlsConfig() *tls.Config {
	cert, err := certificate()
	if err != nil {
		panic(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}}
}

var trusting = &tls.Config{InsecureSkipVerify: true}

// certFiles writes a certificate and its key to files.
func certFiles(t *testing.T) (certFile, keyFile string) {
	cert, err := certificate()
	require.NoError(t, err)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	require.NoError(t, err)
	write := func(name, kind string, der []byte) string {
		name = filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return name
	}
	return write("cert.pem", "CERTIFICATE", cert.Certificate[0]), write("key.pem", "PRIVATE KEY", key)
}

// protocols are the HTTP protocols with which the tests stop a server.
var protocols = []string{"HTTP/1", "HTTPS", "HTTP/2", "h2c"}

// serverOf returns a server for a protocol, and clientOf a client. Each client has its own
// connection pool.
func serverOf(protocol string, handler http.Handler) (*http.Server, func(ctx context.Context, srv *http.Server, ln Listener, opts ...Option) error) {
	srv := &http.Server{Handler: handler}
	switch protocol {
	case "HTTP/1":
		return srv, Serve
	case "h2c":
		srv.Protocols = new(http.Protocols)
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetUnencryptedHTTP2(true)
		return srv, Serve
	}
	srv.TLSConfig = tlsConfig()
	return srv, func(ctx context.Context, srv *http.Server, ln Listener, opts ...Option) error {
		return ServeTLS(ctx, srv, ln, "", "", opts...)
	}
}

// sentBy sends a request. The result is the error of its answer.
func sentBy(tr *http.Transport, url string) (result chan error) {
	result = make(chan error, 1)
	go func() {
		req, _ := http.NewRequest("GET", url, nil)
		_, err := tr.RoundTrip(req)
		result <- err
	}()
	return result
}

func transportOf(protocol string) (tr *http.Transport, scheme string) {
	tr = &http.Transport{Protocols: new(http.Protocols), TLSClientConfig: trusting.Clone()}
	switch protocol {
	case "h2c":
		tr.Protocols.SetUnencryptedHTTP2(true)
		return tr, "http"
	case "HTTP/2":
		tr.Protocols.SetHTTP2(true)
		return tr, "https"
	case "HTTPS":
		tr.Protocols.SetHTTP1(true)
		return tr, "https"
	}
	tr.Protocols.SetHTTP1(true)
	return tr, "http"
}

// A journal is a slog.Handler that records which phases have ended.
type journal struct {
	mu    sync.Mutex
	lines []slog.Record
}

func (*journal) Enabled(context.Context, slog.Level) bool { return true }
func (j *journal) WithAttrs([]slog.Attr) slog.Handler     { return j }
func (j *journal) WithGroup(string) slog.Handler          { return j }

func (j *journal) Handle(_ context.Context, r slog.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, r)
	return nil
}

// line returns the log line of a phase as a map. It returns nil if the phase has not ended.
func (j *journal) line(phase string) map[string]any {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range j.lines {
		if r.Message == "graceful: "+phase {
			m := map[string]any{"level": r.Level}
			r.Attrs(func(a slog.Attr) bool { m[a.Key] = a.Value.Any(); return true })
			return m
		}
	}
	return nil
}

// after waits until a phase has ended.
func (j *journal) after(t *testing.T, phase string) {
	t.Helper()
	until(t, phase, func() bool { return j.line(phase) != nil })
}

func (j *journal) option() Option { return WithLogger(slog.New(j)) }

// part sets how long the stop waits while nothing moves.
func part(d time.Duration) Option {
	return func(o *options) { o.part = d }
}

// secure finishes the TLS handshake of a client.
func secure(t *testing.T, c *client, protocol string) *client {
	t.Helper()
	config := trusting.Clone()
	if protocol == "HTTP/2" {
		config.NextProtos = []string{"h2"}
	}
	tc := tls.Client(c.Conn, config)
	require.NoError(t, tc.Handshake())
	return newClient(t, tc)
}
