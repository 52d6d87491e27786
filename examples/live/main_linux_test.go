package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

// In a real browser the plots move while the program loads itself: the queue fills up to its
// capacity and empties, packets are dropped, and connections wait. With LIVE_SCREENSHOT the
// page is saved under that name.
func TestPage(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("chromium is not installed: apt-get install chromium")
		}
		t.Skip("chromium is not installed: apt-get install chromium")
	}

	picture, refresh := os.Getenv("LIVE_SCREENSHOT"), 100*time.Millisecond
	if picture != "" {
		refresh = time.Second // the page keeps 60 values, and its axis shows a minute
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() {
		ended <- run(ctx, config{
			addr: "127.0.0.1:0", admin: "127.0.0.1:0", backlog: 31, workers: 4,
			work: 50 * time.Millisecond, load: 60, refresh: refresh,
		}, func(page string) error { ready <- page; return nil })
	}()
	defer func() {
		cancel()
		require.NoError(t, <-ended)
	}()
	var page string
	select {
	case page = <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	}

	profile := t.TempDir()
	allocator, cancelAllocator := chromedp.NewExecAllocator(context.Background(),
		chromedp.ExecPath(browser), chromedp.UserDataDir(profile), chromedp.WindowSize(1500, 674), // the plots of the accept queue and no others
		chromedp.Flag("headless", true), chromedp.Flag("hide-scrollbars", true), chromedp.Flag("no-sandbox", true), chromedp.Flag("disable-gpu", true),
		chromedp.Flag("disable-quic", true), chromedp.Flag("no-first-run", true),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true))
	defer cancelAllocator()
	tab, cancelTab := chromedp.NewContext(allocator)
	defer cancelTab()
	tab, cancelTimeout := context.WithTimeout(tab, 170*time.Second)
	defer cancelTimeout()

	require.NoError(t, chromedp.Do(tab, chromedp.Navigate(page), chromedp.WaitVisible("#accept-queue .main-svg")))

	// The plots of the accept queue come before those of the Go runtime.
	first, err := chromedp.Run(tab, chromedp.Evaluate[bool](`(() => {
		const place = d => { const r = d.getBoundingClientRect(); return r.top * 10000 + r.left };
		const all = s => Array.from(document.querySelectorAll(s)).map(place);
		return Math.max(...all("#plots > [id^=accept-]")) < Math.min(...all("#plots > div:not([id^=accept-])"));
	})()`))
	require.NoError(t, err)
	require.True(t, first)

	// y returns the values that a plot shows of one of its series.
	y := func(plot string, series int) []float64 {
		t.Helper()
		values, err := chromedp.Run(tab, chromedp.Evaluate[[]float64](fmt.Sprintf(
			`Array.from(document.getElementById(%q).data[%d]?.y ?? []).filter(v => v != null)`, plot, series)))
		require.NoError(t, err)
		return values
	}
	waitFor := func(what string, good func() bool) {
		t.Helper()
		for deadline := time.Now().Add(90 * time.Second); !good(); <-time.After(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not in time: %s", what)
			}
		}
	}
	const capacity = 32
	waitFor("the peak reaches the capacity, and the queue empties again", func() bool {
		peak := y("accept-queue", 1)
		full := false
		for _, v := range peak {
			if v >= capacity {
				full = true
			}
			if full && v == 0 {
				return true
			}
		}
		return false
	})
	for _, v := range y("accept-queue", 2) {
		require.EqualValues(t, capacity, v)
	}
	waitFor("drops", func() bool { return most(y("accept-drops", 0)) > 0 })
	waitFor("a wait of some turns of the workers", func() bool { return most(y("accept-wait", 1)) >= 0.1 })

	// What is drawn follows the data: the path of the line changes.
	path := func() string {
		d, err := chromedp.Run(tab, chromedp.Evaluate[string](
			`Array.from(document.querySelectorAll("#accept-queue .scatterlayer path")).map(p => p.getAttribute("d")).join()`))
		require.NoError(t, err)
		return d
	}
	before := path()
	require.NotEmpty(t, before)
	waitFor("the line moves", func() bool { return path() != before })

	if picture != "" {
		waitFor("a full picture", func() bool { return len(y("accept-queue", 0)) >= 58 })
		png, err := chromedp.Run(tab, chromedp.CaptureScreenshot())
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(picture, png, 0o644))
	}
}

func most(values []float64) (m float64) {
	for _, v := range values {
		m = max(m, v)
	}
	return m
}
