package main

import (
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLinks(t *testing.T) {
	t.Chdir(t.TempDir())
	require.NoError(t, os.Mkdir("docs", 0o777))
	require.NoError(t, os.WriteFile("here.go", nil, 0o666))
	pages := map[string]*page{
		"README.md":    read("README.md", "# One\n## The `limit`, again\n## One\n```\n# no heading\n```\n"),
		"docs/page.md": read("docs/page.md", "# Page\n"),
	}
	for name := range pages {
		require.NoError(t, os.WriteFile(name, nil, 0o666))
	}
	for _, row := range []struct {
		text string
		ok   bool
	}{
		{"[x](../here.go)", true},
		{"[x](here.go)", false},
		{"![x](../here.svg)", false},
		{"[x](../README.md#one)", true},
		{"[x](../README.md#one-1)", true},
		{"[x](../README.md#one-2)", false},
		{"[x](../README.md#the-limit-again)", true},
		{"[x](../README.md#no-heading)", false},
		{"[x](#page)", true},
		{"[x](#pages)", false},
		{"[x](../here.go#L1)", false},
		{"[x](https://github.com/acceptq/acceptq/blob/main/here.go)", true},
		{"[x](https://github.com/acceptq/acceptq/blob/main/there.go)", false},
		{"[x](https://example.com/there)", true},
		{"[x]: ../there.go", false},
		{"| [x](../README.md) | [y](../there.go) |", false},
		{"`[x](code)` [y](../here.go)", true},
	} {
		p := read("docs/page.md", "# Page\n"+row.text+"\n")
		require.NotEmpty(t, p.links, row.text)
		ok := true
		for _, l := range p.links {
			ok = ok && l.resolve(p, pages) == nil
		}
		require.Equal(t, row.ok, ok, row.text)
	}
}

func TestForWhom(t *testing.T) {
	require.NoError(t, read("a.md", "# A\n\nThis page is for operators.\n\nMore.\n").forWhom())
	require.Error(t, read("a.md", "# A\n\nMore.\n\nThis page is for operators.\n").forWhom())
	require.NoError(t, read("README.md", "# A\n\nMore.\n").forWhom())
}

func needBash(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip(err)
	}
}

func TestBlocks(t *testing.T) {
	needBash(t)
	for _, row := range []struct {
		text     string
		runs, ok bool
	}{
		{"```sh\ngo vet ./...  # all\nGOOS=js go test .\n```\n", true, true},
		{"```sh\nsudo sysctl -w a=1\n```\n", false, true},
		{"```sh\ngo install x\n```\n", false, true},
		{"```sh\ncd bench\n```\n", false, true},
		{"```sh\nif true\n```\n", false, false},
		{"```go\nx := 1\n```\n", false, true},
		{"```go\ntype x int\n```\n", false, true},
		{"```go\nx := \n```\n", false, false},
		{"```yaml\n{\n```\n", false, true},
		{"```sh\n", false, false},
	} {
		blocks := read("a.md", row.text).blocks
		require.Len(t, blocks, 1, row.text)
		require.Equal(t, row.runs, blocks[0].runs(), row.text)
		require.Equal(t, row.ok, blocks[0].check(true) == nil, row.text)
	}
	require.Equal(t, "why", read("a.md", "<!-- not run: why -->\n```sh\nx\n```\n").blocks[0].notRun)
	require.Empty(t, read("a.md", "<!-- not run: why -->\ntext\n```sh\nx\n```\n").blocks[0].notRun)
}

func TestBlockThatFails(t *testing.T) {
	needBash(t)
	failing := block{page: "a.md", kind: "sh", text: "go vet ./none-such\n"}
	require.True(t, failing.runs())
	require.Error(t, failing.check(false))
	failing.notRun = "it fails"
	require.NoError(t, failing.check(false))
}

func TestLinksInComments(t *testing.T) {
	t.Chdir(t.TempDir())
	const to = "// [x]: https://github.com/acceptq/acceptq/blob/main/"
	require.NoError(t, os.WriteFile("a.go", []byte(to+"a.go\n"), 0o666))
	require.NoError(t, inComments(nil))
	require.NoError(t, os.WriteFile("a.go", []byte(to+"b.go\n"), 0o666))
	require.Error(t, inComments(nil))
}

func TestCovers(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, name := range []string{"a.go", "b_linux.go", "c_test.go"} {
		require.NoError(t, os.WriteFile(name, nil, 0o666))
	}
	require.NoError(t, covers(read("CONTRIBUTING.md", "| `a.go`, `b*.go` |\n")))
	require.Error(t, covers(read("CONTRIBUTING.md", "| `a.go` |\n")), "b_linux.go")
	require.Error(t, covers(read("CONTRIBUTING.md", "| `a.go`, `b*.go`, `d.go` |\n")))
}
