package page

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWrite(t *testing.T) {
	const begin, end = "<!-- written by: x -->\n", "<!-- end of what is written -->\n"
	name := filepath.Join(t.TempDir(), "page.md")
	store := func(text string) {
		if err := os.WriteFile(name, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	store("before\n" + begin + "old\n" + end + "behind\n")
	for range 2 { // the second time nothing changes
		if err := Write(name, "x", "new\n"); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if want := "before\n" + begin + "\nnew\n\n" + end + "behind\n"; string(text) != want {
			t.Fatalf("%q, not %q", text, want)
		}
	}
	for _, text := range []string{"no marks", begin, end} {
		store(text)
		if err := Write(name, "x", "new\n"); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}
