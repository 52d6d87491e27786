package acceptqprom

import (
	"bytes"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/rawtcp"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A minute of the rules is quickMinute in TestAlarms, so that the test takes half a minute.
const quickMinute = 3 * time.Second

// quick returns the rules with shorter durations.
func quick(t *testing.T) string {
	t.Helper()
	rules, err := os.ReadFile("alerts.yml")
	require.NoError(t, err)
	minutes := regexp.MustCompile(`(\[|offset |for: )(\d+)m\b`)
	text := minutes.ReplaceAllStringFunc(string(rules), func(s string) string {
		m := minutes.FindStringSubmatch(s)
		n, _ := strconv.Atoi(m[2])
		return fmt.Sprintf("%s%ds", m[1], n*int(quickMinute/time.Second))
	})
	require.Contains(t, text, "oldest_wait_seconds > 60\n")
	return strings.Replace(text, "oldest_wait_seconds > 60\n", fmt.Sprintf("oldest_wait_seconds > %v\n", quickMinute.Seconds()), 1)
}

// A real Prometheus watches servers in trouble and servers that only seem to be. Each is in
// a network namespace of its own, as its counters are. The alarms that fire at any time
// must be exactly those that a person would want.
func TestAlarms(t *testing.T) {
	binary := program(t, "prometheus", "prometheus")
	testkit.InNamespace(t, func(t *testing.T) {
		pages := http.NewServeMux()
		admin := listen(t)
		srv := &http.Server{Handler: pages}
		go srv.Serve(admin)
		defer srv.Close()

		var targets []string
		want := make(map[string][]string)
		var troubles []*host
		for _, trouble := range []struct {
			name   string
			make   func(t *testing.T, h *host)
			alarms []string
		}{
			{"quiet", quiet, nil},
			{"burst", burst, []string{"AcceptQueueDrops"}},
			{"burst of an MPTCP listener", burstMPTCP, []string{"AcceptQueueDrops"}},
			{"stuck", stuck, []string{"AcceptQueueStuck"}},
			{"flood, cookies on", flood(1), []string{"SYNQueueFull"}},
			{"flood, cookies off", flood(0), []string{"SYNQueueDrops"}},
			{"one full shard of eight", oneFullShard, []string{"AcceptQueueDrops", "AcceptQueueFilling"}},
			{"scan", scan, nil},
			{"half-open health checks", healthChecks, nil},
			{"deferred accepts", deferredAccepts, nil},
			{"restart", restart, nil},
		} {
			h := newHost(t, trouble.make)
			troubles = append(troubles, h)
			path := fmt.Sprint("/", len(troubles))
			pages.Handle(path, h)
			targets = append(targets, fmt.Sprintf("{targets: [%q], labels: {instance: %q, __metrics_path__: %q}}", admin.Addr(), trouble.name, path))
			if trouble.alarms != nil {
				want[trouble.name] = trouble.alarms
			}
		}
		p := startPrometheus(t, binary, 500*time.Millisecond, quick(t),
			"job_name: api, static_configs: ["+strings.Join(targets, ", ")+"]", 9090)
		p.wait(t, `count(tcp_listen_overflows_total == 0)`, is(float64(len(troubles)))) // increase() needs a first sample
		for _, h := range troubles {
			close(h.begin)
		}

		fired := func() map[string][]string {
			all := make(map[string][]string)
			var v vector
			if p.try("query?"+url.Values{"query": {`count by (instance, alertname) (count_over_time(ALERTS{alertstate="firing"}[5m]))`}}.Encode(), &v) == nil {
				for _, r := range v.Result {
					all[r.Metric["instance"]] = append(all[r.Metric["instance"]], r.Metric["alertname"])
				}
			}
			for _, alarms := range all {
				slices.Sort(alarms)
			}
			return all
		}
		var last any
		p.eventually(t, "the alarms", func() bool {
			all := fired()
			last = all
			return maps.EqualFunc(want, all, slices.Equal[[]string])
		}, &last)
		// A false alarm has had time to fire when the slowest rule has seen its whole range.
		slowest := time.Now().Add(7 * quickMinute)
		p.eventually(t, "the slowest rule", func() bool { return time.Now().After(slowest) })
		require.Equal(t, want, fired())
		require.Empty(t, p.query(t, `{__name__=~"tcp_.*"} < 0`), "what is unknown is absent")
		require.NotEmpty(t, p.query(t, `tcp_accept_queue_drops_total{instance="scan"} > 0`), "the scan was counted")
		require.NotEmpty(t, p.query(t, `tcp_accept_queue_handshakes{instance="flood, cookies off"} > 0`))
	})
}

// A host is a server in a network namespace of its own. All calls that make sockets or read
// counters run on its thread.
type host struct {
	c     *Collector
	calls chan func()
	begin chan struct{} // closed when Prometheus has the first samples
	done  chan struct{} // closed at the end of the test
	work  sync.WaitGroup
}

func newHost(t *testing.T, trouble func(t *testing.T, h *host)) *host {
	h := &host{calls: make(chan func()), begin: make(chan struct{}), done: make(chan struct{})}
	h.work.Go(func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
		}
		for {
			select {
			case f := <-h.calls:
				f()
			case <-h.done:
				return
			}
		}
	})
	h.do(func() { testkit.LoopbackUp(t) })
	h.c = NewCollector(WithSampler(10*time.Millisecond, quickMinute), WithHandshakes(time.Second))
	t.Cleanup(h.work.Wait) // after the listeners have been closed
	trouble(t, h)
	t.Cleanup(func() {
		close(h.done)
		h.c.Close()
	})
	return h
}

// do runs f in the namespace of h.
func (h *host) do(f func()) {
	done := make(chan struct{})
	select {
	case h.calls <- func() { f(); close(done) }:
		<-done
	case <-h.done:
	}
}

// load runs f again and again after the beginning, until the test ends.
func (h *host) load(every time.Duration, f func()) {
	h.work.Go(func() {
		select {
		case <-h.begin:
		case <-h.done:
			return
		}
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				h.do(f)
			case <-h.done:
				return
			}
		}
	})
}

// once runs f once after the beginning.
func (h *host) once(f func()) {
	h.work.Go(func() {
		select {
		case <-h.begin:
			f()
		case <-h.done:
		}
	})
}

func (h *host) listen(t *testing.T, opts ...acceptq.Option) (ln *acceptq.Listener) {
	h.do(func() {
		ln = listen(t, opts...)
		_, err := h.c.Add("api", ln)
		require.NoError(t, err)
	})
	return ln
}

// ServeHTTP answers a scrape with what the Collector reports in the namespace of h. A
// registry would call the Collector in a goroutine of its own.
func (h *host) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	var got snapshot
	h.do(func() {
		ch := make(chan prometheus.Metric, 1000)
		h.c.Collect(ch)
		close(ch)
		for m := range ch {
			got = append(got, m)
		}
	})
	reg := prometheus.NewRegistry()
	reg.MustRegister(got)
	var page bytes.Buffer
	serveText(reg, &page)
	page.WriteTo(w)
}

// A snapshot is a Collector of metrics that were collected before.
type snapshot []prometheus.Metric

func (s snapshot) Describe(chan<- *prometheus.Desc) {}
func (s snapshot) Collect(ch chan<- prometheus.Metric) {
	for _, m := range s {
		ch <- m
	}
}

// dial connects one client, which stays connected until the test ends.
func dial(t *testing.T, addr net.Addr, patience time.Duration) bool {
	c, err := net.DialTimeout("tcp", addr.String(), patience)
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return err == nil
}

func acceptAll(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		c.Close()
	}
}

// serve accepts all clients of ln, and lets some come.
func serve(h *host, ln *acceptq.Listener) {
	go acceptAll(ln)
	h.load(100*time.Millisecond, func() {
		if c, err := net.DialTimeout("tcp", ln.Addr().String(), time.Second); err == nil {
			c.Write([]byte("x"))
			c.Close()
		}
	})
}

func quiet(t *testing.T, h *host) { serve(h, h.listen(t)) }

// The queue overflows once and is empty again at once.
func burst(t *testing.T, h *host) {
	const capacity = 21
	burstOn(t, h, h.listen(t, acceptq.WithBacklog(capacity-1)), capacity)
}

// net.Listen makes an MPTCP socket, whose drops the program does not know.
func burstMPTCP(t *testing.T, h *host) {
	var ln net.Listener
	h.do(func() {
		require.NoError(t, os.WriteFile("/proc/sys/net/core/somaxconn", []byte("20"), 0))
		var lc net.ListenConfig
		lc.SetMultipathTCP(true)
		var err error
		ln, err = lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		_, err = h.c.Add("api", ln.(*net.TCPListener))
		require.NoError(t, err)
	})
	t.Cleanup(func() { ln.Close() })
	burstOn(t, h, ln, 21)
}

func burstOn(t *testing.T, h *host, ln net.Listener, capacity int) {
	h.once(func() {
		h.do(func() {
			for range capacity {
				dial(t, ln.Addr(), time.Second)
			}
			dial(t, ln.Addr(), 50*time.Millisecond)
		})
		acceptAll(ln)
	})
}

// 49 of 4,097 connections wait, and Accept has stopped.
func stuck(t *testing.T, h *host) {
	ln := h.listen(t)
	h.once(func() {
		h.do(func() {
			for range 49 {
				dial(t, ln.Addr(), time.Second)
			}
		})
	})
}

func wire(t *testing.T, h *host) (w *rawtcp.Wire) {
	h.do(func() {
		var err error
		w, err = rawtcp.Open()
		require.NoError(t, err)
	})
	t.Cleanup(w.Close)
	return w
}

func sender(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 4000)
}

func address(ln *acceptq.Listener) netip.AddrPort { return netip.MustParseAddrPort(ln.Addr().String()) }

// SYNs come from senders that do not finish the handshake. With cookies healthy clients get
// in; without them they do not.
func flood(cookies int) func(t *testing.T, h *host) {
	return func(t *testing.T, h *host) {
		h.do(func() {
			require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte(strconv.Itoa(cookies)), 0))
		})
		ln := h.listen(t, acceptq.WithBacklog(16))
		go acceptAll(ln)
		w := wire(t, h)
		n, healthy := 0, 0
		h.load(100*time.Millisecond, func() {
			for range 20 {
				if err := w.Send(rawtcp.Segment{From: sender(n), To: address(ln), Seq: 1, Flags: rawtcp.SYN}); err != nil {
					t.Error(err)
				}
				n++
			}
			if n <= 400 && dial(t, ln.Addr(), 20*time.Millisecond) {
				healthy++
			}
		})
		t.Cleanup(func() { t.Logf("SYN cookies %d: %d of 20 healthy clients connected", cookies, healthy) })
	}
}

// The first of eight shards does not accept. The sum of the queues is far below its capacity.
func oneFullShard(t *testing.T, h *host) {
	var shards *acceptq.Shards
	h.do(func() {
		var err error
		shards, err = acceptq.ListenTCPShards("127.0.0.1:0", 8, acceptq.WithBacklog(15))
		require.NoError(t, err)
		_, err = h.c.AddShards("api", shards)
		require.NoError(t, err)
	})
	t.Cleanup(func() { shards.Close() })
	first := true
	for ln := range shards.All() {
		if !first {
			go acceptAll(ln)
		}
		first = false
	}
	h.load(10*time.Millisecond, func() { dial(t, shards.Addr(), 10*time.Millisecond) })
}

// A scanner sends all kinds of segments, and the server has clients.
func scan(t *testing.T, h *host) {
	ln := h.listen(t)
	serve(h, ln)
	w := wire(t, h)
	n := 0
	h.load(100*time.Millisecond, func() {
		for _, flags := range []uint8{rawtcp.SYN, rawtcp.FIN, rawtcp.SYN | rawtcp.FIN, rawtcp.RST, rawtcp.ECE | rawtcp.CWR, 0} {
			if err := w.Send(rawtcp.Segment{From: sender(n % 50), To: address(ln), Seq: 1, Flags: flags}); err != nil {
				t.Error(err)
			}
			n++
		}
	})
}

func healthChecks(t *testing.T, h *host) {
	ln := h.listen(t)
	serve(h, ln)
	w := wire(t, h)
	n := 0
	h.load(200*time.Millisecond, func() {
		if _, err := w.HalfOpen(sender(n), address(ln)); err != nil {
			t.Error(err)
		}
		n++
	})
}

func deferredAccepts(t *testing.T, h *host) {
	serve(h, h.listen(t, acceptq.WithDeferAccept(time.Second)))
}

// The server listens again, with counters that begin at 0.
func restart(t *testing.T, h *host) {
	old := h.listen(t)
	go acceptAll(old)
	h.once(func() {
		h.do(func() { dial(t, old.Addr(), time.Second) })
		select {
		case <-time.After(2 * quickMinute):
		case <-h.done:
			return
		}
		old.Close()
		serve(h, h.listen(t))
	})
}
