package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb/dirhash"
	"golang.org/x/mod/zip"
)

const rootPath = "github.com/acceptq/acceptq"

// folder is that of a module in the repository; "" is the root.
type folder string

// published has the modules that get a tag for each release. A module stands after those
// that it requires.
var published = []folder{"", "prom", "otel"}

func (f folder) path() string { return path.Join(rootPath, string(f)) }

func (f folder) tag(version string) string { return path.Join(string(f), version) }

// name is that of the files of the module under api.
func (f folder) name() string {
	if f == "" {
		return "acceptq"
	}
	return string(f)
}

// ours reports whether a module is one of this repository.
func ours(modulePath string) bool {
	return modulePath == rootPath || strings.HasPrefix(modulePath, rootPath+"/")
}

// export copies the files of the tree in dir that git knows or would add.
func export(dir, to string) error {
	list, err := output(dir, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(list, "\x00"), "\x00") {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if os.IsNotExist(err) {
			continue // deleted in the work tree
		}
		if err != nil {
			return err
		}
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(to, name), text, info.Mode().Perm()); err != nil {
			return err
		}
	}
	return nil
}

func writeFile(name string, text []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o777); err != nil {
		return err
	}
	return os.WriteFile(name, text, mode)
}

// pack adds a version of a module to a module proxy, a folder with the files of the GOPROXY
// protocol. dir is the exported tree. The zip file does not contain the nested modules.
func pack(dir string, f folder, version, proxy string) error {
	source := filepath.Join(dir, string(f))
	if f != "" { // as the go command does for a module without a license
		if err := copyMissing(filepath.Join(dir, "LICENSE"), filepath.Join(source, "LICENSE")); err != nil {
			return err
		}
	}
	at := filepath.Join(proxy, f.path(), "@v")
	gomod, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return err
	}
	info, err := json.Marshal(struct {
		Version string
		Time    time.Time
	}{version, time.Now().UTC()})
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{"list": []byte(version + "\n"), version + ".mod": gomod, version + ".info": info} {
		if err := writeFile(filepath.Join(at, name), text, 0o666); err != nil {
			return err
		}
	}
	archive, err := os.Create(filepath.Join(at, version+".zip"))
	if err != nil {
		return err
	}
	defer archive.Close()
	if err := zip.CreateFromDir(archive, module.Version{Path: f.path(), Version: version}, source); err != nil {
		return err
	}
	return archive.Close()
}

func copyMissing(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o666)
}

// writeSums adds to the go.sum of each published module the hashes of the other ones that it
// requires. So a checkout of the tag builds as soon as the tags are published.
func writeSums(dir, version string) error {
	work, err := os.MkdirTemp("", "release")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	tree, proxy := filepath.Join(work, "tree"), filepath.Join(work, "proxy")
	if err := export(dir, tree); err != nil {
		return err
	}
	lines := make(map[string][]string)
	for _, f := range published {
		name := filepath.Join(dir, string(f), "go.mod")
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		gomod, err := modfile.Parse(name, text, nil)
		if err != nil {
			return err
		}
		var sums []string
		for _, r := range gomod.Require {
			sums = append(sums, lines[r.Mod.Path]...)
		}
		if sums != nil {
			if err := addSums(filepath.Join(dir, string(f), "go.sum"), sums); err != nil {
				return err
			}
			if err := addSums(filepath.Join(tree, string(f), "go.sum"), sums); err != nil {
				return err
			}
		}
		if err := pack(tree, f, version, proxy); err != nil {
			return err
		}
		at := filepath.Join(proxy, f.path(), "@v", version)
		all, err := dirhash.HashZip(at+".zip", dirhash.Hash1)
		if err != nil {
			return err
		}
		only, err := dirhash.Hash1([]string{"go.mod"}, func(string) (io.ReadCloser, error) { return os.Open(at + ".mod") })
		if err != nil {
			return err
		}
		lines[f.path()] = []string{
			fmt.Sprintf("%s %s %s", f.path(), version, all),
			fmt.Sprintf("%s %s/go.mod %s", f.path(), version, only),
		}
	}
	return nil
}

// addSums adds lines to a go.sum file, which is sorted.
func addSums(name string, sums []string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		sums = append(sums, strings.TrimSuffix(line, "\n"))
	}
	slices.Sort(sums)
	return os.WriteFile(name, []byte(strings.Join(sums, "\n")+"\n"), 0o666)
}
